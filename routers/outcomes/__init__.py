"""Outcome tables, the input of training and evaluation: n queries x m experts, with scores, costs and answers."""
