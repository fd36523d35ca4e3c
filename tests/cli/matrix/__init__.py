"""Command lines by the thousand, carried out by qemu-img and by this program under its name, and compared.

``images`` makes what they work on, ``cases`` generates them, ``twins`` runs both, ``differences`` lists what is meant
to differ, and why. ``python -m tests.cli.matrix --count`` tells how many there are, ``python -m tests.cli.matrix WORD
...`` runs those that contain all the words.
"""
