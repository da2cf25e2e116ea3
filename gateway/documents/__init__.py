"""The user's own documents: adding, listing and searching them, and answers from them."""
