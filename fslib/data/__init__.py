"""What is learned: tasks and their examples, as texts and as batches."""
