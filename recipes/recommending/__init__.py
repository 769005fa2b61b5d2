"""What a recommender is told of users and items, and what it answers."""
