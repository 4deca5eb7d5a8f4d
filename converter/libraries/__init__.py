"""What each model's own library wants of its weights."""
