"""The tokenizer service: text in, windows of token ids out, and back again."""
