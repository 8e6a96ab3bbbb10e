"""MindFormers' predict YAML, read as shardrun's keys: one file for each part of theirs."""
