"""The order of the steps and nothing else; read flows/cycle.py first."""
