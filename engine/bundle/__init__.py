"""What export wrote: the manifest and its files, the tokenizer, copies from a URI, the cache folder."""
