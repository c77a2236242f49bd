"""Signatures of other libraries."""
