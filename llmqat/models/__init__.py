"""Model families: names of modules and configs, and the one file that knows transformers'
internals.
"""
