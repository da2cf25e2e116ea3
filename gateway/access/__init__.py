"""API keys: who calls, what they may do, how much of it, and whose data they see."""
