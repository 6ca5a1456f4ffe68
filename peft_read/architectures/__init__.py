"""What is known of model architectures: functions that read a model's structure, and one table of exceptions."""
