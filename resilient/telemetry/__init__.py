"""Where events go: listeners for logging, one file for each destination."""
