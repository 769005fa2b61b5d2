"""What a model is trained on: prompts, tasks, their mixture and their order."""
