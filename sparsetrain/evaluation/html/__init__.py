"""A page of one run, and of several, as one HTML file without anything outside of it."""
