"""What ships with the product: the question-answering model in ``qa``."""
