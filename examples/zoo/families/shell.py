"""What someone wants done with files -> one shell command."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Row, lines, words

_PHRASES: Final = MappingProxyType(
    {
        "head -n {k} {f}": lines("""
            show me the first {k} lines of {f}
            I want to see just the top {k} lines of {f}
            What are the {k} lines at the start of {f}
            only the beginning of {f} please, {k} lines
            what are the {k} first lines in {f}
            How do I print the first {k} rows of the file {f}
            give me the top {k} rows of {f}
            {k} lines from the start of {f} will do
            let me see how {f} begins, {k} lines of it
            I need the opening {k} lines of {f}
            ---
            print {k} lines from the very beginning of {f}
            How does {f} start? The first {k} lines are enough
            cut {f} off after line {k} and show me that
            a peek at the top of {f}, {k} lines
        """),
        "tail -n {k} {f}": lines("""
            show the last {k} lines of {f}
            Print the end of {f}, {k} lines are enough
            I need the final {k} lines from {f}
            what do the last {k} lines in {f} say?
            let me look at the bottom {k} lines of {f}
            give me the {k} newest lines at the end of {f}
            What are the {k} lines at the end of {f}
            only the bottom of {f} please, {k} lines
            How does {f} end? {k} lines of it
            the last {k} rows of {f} will do
            ---
            print {k} lines from the very end of {f}
            what was written to {f} most recently? {k} lines
            show the closing {k} lines of {f}
            just the final {k} rows in {f}
        """),
        "wc -l {f}": lines("""
            count the lines in {f}
            How many lines does {f} have?
            I'd like to know how long {f} is in lines
            tell me the line count of {f}
            what is the number of lines of {f}
            How many rows are in {f}
            give me the count of lines for {f}
            is {f} long? Count its lines
            number of lines in {f} please
            I wonder how many lines are in {f}
            ---
            how long is {f}, counted in lines?
            Find out the number of rows {f} has
            line total of {f}
            of how many lines does {f} consist
        """),
        "grep {w} {f}": lines("""
            find the word {w} in {f}
            Which lines of {f} contain {w}
            search {f} for {w}
            show every line with {w} in the file {f}
            I am looking for {w} inside {f}
            does {w} occur in {f}
            get me all lines of {f} that mention {w}
            print the lines that have {w} in {f}
            Look for {w} in the file {f}
            where does {f} say {w}
            ---
            filter {f} for lines with {w}
            is the word {w} anywhere in {f}
            Pull out every line from {f} where {w} appears
            any mention of {w} in {f}? Show me the lines
        """),
        "cp {f} {g}": lines("""
            copy {f} to {g}
            Make a copy of {f} called {g}
            I want to duplicate {f} as {g}
            please back up {f} under the name {g}
            keep {f} but also have it copied as {g}
            I need {f} twice, the second one called {g}
            clone the file {f} into {g}
            Save a second copy of {f} as {g}
            create a duplicate of {f} named {g}
            put a copy of {f} in {g}
            ---
            leave {f} as it is and give me a copy under {g}
            {g} should be an exact copy of {f}
            before I edit {f}, copy it to {g}
            Take {f} and make a duplicate, {g}
        """),
        "mv {f} {g}": lines("""
            rename {f} to {g}
            {f} should be called {g} from now on
            Move {f} to {g}
            change the name of {f} into {g}
            I'd rather have {f} named {g}, rename it
            give {f} the new name {g}
            The file {f} has the wrong name, it must be {g}
            {f} needs a new name, namely {g}
            let {f} become {g}
            please change the file name {f} to {g}
            ---
            {f} is now to be known as {g}
            I misnamed {f}, call it {g} instead
            Set the name of {f} to {g}
            swap the file name {f} for {g}
        """),
        "rm {f}": lines("""
            delete {f}
            Get rid of the file {f}
            I don't need {f} any more, remove it
            please erase {f} from the disk
            remove {f} for good
            throw {f} away
            The file {f} can go
            {f} is useless now, wipe it
            I want to delete the file {f}
            get {f} off my disk
            ---
            {f} has to go
            Permanently remove the file called {f}
            take {f} away, I won't read it again
            clean up by deleting {f}
        """),
        "mkdir {d}": lines("""
            make a new folder called {d}
            Create the directory {d}
            I need an empty folder named {d}
            set up a directory with the name {d}
            create a new {d} folder for me
            There is no {d} folder yet, add one
            start a directory called {d}
            add a folder with the name {d}
            I want a fresh directory {d}
            please create a folder {d}
            ---
            I want to have a directory {d}, make it
            Give me a new, empty {d} directory
            we need another folder, name it {d}
            open up a new folder under the name {d}
        """),
        "du -sh {d}": lines("""
            how much space does the folder {d} take?
            How big is the directory {d}
            what is the total size of {d} on the disk?
            tell me the disk usage of the {d} folder
            how large is everything in {d} together?
            What does the folder {d} use up on my disk
            is the {d} directory large? Show its size
            how many gigabytes are in the folder {d}
            size of the directory {d} please
            how much room does the {d} folder need
            ---
            how heavy is the {d} directory in total?
            Report the space that the folder {d} occupies
            sum up the size of all that is in the folder {d}
            does the {d} folder take a lot of disk space? Tell me how much
        """),
        "sort {f}": lines("""
            put the lines of {f} in alphabetical order
            Print {f} sorted from a to z
            order the lines in {f} alphabetically
            I want to see {f} with its lines sorted
            show the lines of {f} in alphabetical order
            arrange the lines of {f} from a to z
            alphabetise the lines of {f}
            show {f} with all lines in order
            list the rows of {f} alphabetically
            can you sort what is in {f}
            ---
            give me {f} in alphabetical order, line by line
            Sort all rows of {f}
            bring the lines of {f} into order from a to z
            show what {f} contains, ordered alphabetically
        """),
    }
)
_LEADS = lines("""
    On my linux box:
    In the terminal,
    Quick one:
    In bash,
    From the command line:
    On the server,
    Help me out:
    In a console,
    On ubuntu:
    With a terminal open:
    ---
    On my raspberry pi:
    I'm logged in over ssh.
    For a unix beginner:
    In my terminal window,
    Linux question:
""")
_STEMS = words("""
    server report notes users access orders backup config results data error todo index summary events sales
    archive prices names output draft budget mail members letter items recipe backlog clients songs survey diary
    invoices readings stock visits books travel garden
    ---
    schedule menu contacts profile timeline poems grades checklist weather agenda changes shipments
""")
_SUFFIXES = ("txt", "log", "csv", "md", "json")  # a closed class
_FOLDERS = words("""
    photos music projects downloads scripts backups videos reports games models drafts pictures papers website
    fonts assets lectures homework source notebooks
    ---
    icons slides recordings exports uploads essays sketches albums sounds tools
""")
_WORDS = words("""
    error timeout Berlin apple failed password Monday total warning Smith urgent denied coffee refused Paris
    missing invalid blue started London closed expired summer ticket critical
    ---
    panic Madrid refund Jones winter banana offline Friday pending green crash Tokyo
""")


def _make(draw: Draw) -> Row:
    command = draw.rng.choice(tuple(_PHRASES))
    first, second = draw.picks(_STEMS, 2)
    suffix = draw.rng.choice(_SUFFIXES)
    values = {
        "f": f"{first}.{suffix}",
        "g": f"{second}.{suffix}",
        "d": draw.pick(_FOLDERS),
        "w": draw.pick(_WORDS),
        "k": draw.rng.randrange(2, 60),
    }
    phrase = draw.pick(_PHRASES[command]).format(**values)
    if draw.rng.random() < 0.4:
        phrase = f"{draw.pick(_LEADS)} {phrase[0].lower()}{phrase[1:]}"
    return Row(phrase, command.format(**values))


SHELL = Family(
    name="shell",
    about="what someone wants done with files, to one command",
    grader="exact",
    max_tokens=20,
    make=_make,
    pools={
        "leads": _LEADS,
        "stems": _STEMS,
        "folders": _FOLDERS,
        "words": _WORDS,
        **{f"phrases_{command.split()[0]}": pool for command, pool in _PHRASES.items()},
    },
)
