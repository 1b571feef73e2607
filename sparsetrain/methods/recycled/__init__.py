"""Recycled attention: rows read the keys that an earlier row has chosen."""
