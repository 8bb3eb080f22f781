"""Reading the text of an answer: thinking text, option letters, numbers, refusals, in ten languages.

Graders and votes read answers with the same functions, so that an answer that is graded as `B` also votes for `B`.
All of them take time linear in the text.

    thinking.py   the text without the thinking that precedes it
    text.py       one form for equal characters: widths, digits of all scripts, invisible marks
    stated.py     the part of a text that states the answer: "the answer is ...", `\\boxed{...}`
    options.py    the letter of the option that a text names
    phrases.py    the phrases that state, confirm or rule out a letter
    numbers.py    the numbers of a text
    refusals.py   whether a text refuses, or says that it does not know
"""
