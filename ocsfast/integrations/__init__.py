"""Callbacks for training frameworks, each of which is imported only with its own module."""
