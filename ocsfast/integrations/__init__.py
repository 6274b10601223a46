"""Callbacks for training frameworks, and the forward pass of detectors.

A framework is imported only by the module of its own.
"""
