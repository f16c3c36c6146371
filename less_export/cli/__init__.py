"""The command line ``less-export``."""
