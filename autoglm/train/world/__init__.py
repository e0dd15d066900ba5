"""The world the model learns from: screens, speech and tasks, generated from seeds."""
