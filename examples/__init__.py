"""Things to run and to read: a tiny trainer, rewards, the demo."""
