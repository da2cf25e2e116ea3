"""Your own documents: reading, passages, storage, and lexical and dense retrieval.

Plain Python without HTTP or gRPC. A `Library` keeps collections of documents in a directory;
a `Collection` adds, deletes and searches.
"""
