"""One check of everything that is loaded: rules, and what they say of this library's state."""
