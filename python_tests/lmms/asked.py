"""What the checkpoints of these tests are asked."""

ASKED = [  # (pictures, question); an odd number, so that two processes have not equally many
    (["0.png"], "What is this?"),
    (["1.png"], "\nWhich colour has it, and is there more of it on the left or on the right?"),
    (["0.png", "2.png"], "Which of the two is larger?"),
    ([], "What is two and two?"),
    (["2.png"], "Why?"),
    (["1.png", "0.png", "1.png"], "How often is the same picture shown?"),
    ([], "Who painted the ceiling of the Sistine Chapel, and when?"),
]
NEW_TOKENS = 8  # as the task says
PRIOR = 4.0
