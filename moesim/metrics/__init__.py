"""WHAT HAPPENED: pure functions of a trace."""
