"""The swarm wing: nodes that exchange completions and learn from them with GRPO."""
