"""Training runs to start from: `python -m examples.rl_loop.even_numbers`."""
