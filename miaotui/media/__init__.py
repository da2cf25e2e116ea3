"""Sound and pictures to what a model's encoder takes."""
