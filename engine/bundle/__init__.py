"""Exported bundles: the manifest and its files, the tokenizer, local copies of remote bundles, run signatures."""
