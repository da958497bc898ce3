"""The check of everything that is loaded: rules of any values, and the rules of saved states."""
