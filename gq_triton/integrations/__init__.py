"""Callbacks for training frameworks; each module needs its framework, and imports no other."""
