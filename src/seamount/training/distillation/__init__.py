"""A small model learns from a large one: what the teacher guesses is the student's target."""
