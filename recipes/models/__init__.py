"""What is added to a pre-trained model."""
