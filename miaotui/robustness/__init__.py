"""What makes answers less certain: unusual input, and how answers fare when it is disturbed."""
