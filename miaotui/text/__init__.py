"""Text: cleaning and normalisation that know where each character came from, and tokens."""
