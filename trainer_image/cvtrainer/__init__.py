"""The built-in trainer: `python -m cvtrainer` inside a job. It knows the contract's folders, no platforms."""
