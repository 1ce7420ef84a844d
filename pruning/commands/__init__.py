"""The commands of `lowkey-prune`, one file each; `pruning.cli` puts them together."""
