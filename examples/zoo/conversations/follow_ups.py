"""Follow-ups: what users write after an answer, by family, and what fits after any of them.

Templates are held out by split, like those of the families. {n} is a number, {d} a date, {q} a quantity, {x} a thing,
{name} a first name, {day} a weekday, {f} a file, {w} a word.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Pool, lines, phrases, words

FOLLOW_UPS: Final = MappingProxyType(
    {
        "sql": lines("""
            and the ones older than {n}?
            only those with more than {n}, please
            now just count them
            and what is the average of it?
            the same, but sorted from the largest
            and the smallest one?
            only the first {n} of them
            what if I also want the ones named '{w}'?
            and the total?
            now without the ones under {n}
            can you restrict that to '{w}'?
            and how many is that?
            show them all instead
            the other column too, please
            and which of them has the most?
            leave out everything above {n}
            make it at least {n}
            now do it for '{w}'
            and the maximum instead of the average?
            same question, but below {n}
            ---
            and if it is over {n}?
            narrow it down to '{w}'
            okay, and the lowest of those?
            then the sum as well
            do it the other way round, ascending
        """),
        "shell": lines("""
            and for {f}?
            now do that with {f} as well
            the same one, but only the first {n} lines
            and how do I undo it?
            also the hidden ones
            and the last {n}?
            what about the folder above?
            now in reverse order
            and copy it to backup first
            does that also work for {f}?
            make it ignore upper and lower case
            and if there is more than one?
            then delete it
            with the sizes, please
            and count them too
            rename it back
            now everything that ends in .{w}
            and after that move it to {f}
            without asking me each time
            and only {n} of them
            ---
            the same thing to {f}, please
            and put the outcome into {f}
            now the other one, {f}
            add the line numbers too
            can it go through all of them?
        """),
        "fields": lines("""
            make it {n} people instead
            and on {day} rather?
            actually, put it under {name}
            we will be one more
            sorry, {day} is better
            and two of them are children
            change the name to {name}
            could it be {day} too?
            one fewer, {name} cannot make it
            the same for {name} on {day}
            no, {n} of us
            and once more for {day}
            it should say {name}, not that
            then {day}, if that is all right
            {name} will come along as well
            better {n}, just to be safe
            and another one, same day, for {name}
            could we move it to {day}?
            {n}, I miscounted
            please correct it to {name}
            ---
            rather {day} then
            we are {n} now
            use {name} for it, please
            and the same again a week later
            {name} brings two more
        """),
        "dates": lines("""
            and {d}?
            now the one after: {d}
            the same for {d}
            what about {d} then?
            and one day later?
            {d} as well, please
            and a week before that?
            my sister has {d}
            the next one says {d}
            and the day before?
            also {d}
            one year earlier?
            {d}, in the same way
            and for {d}, like the last one
            then {d}
            how about {d}?
            and for the end of that month?
            sorry, I meant {d}
            and likewise {d}
            one more: {d}
            ---
            {d} too
            ok and {d}?
            it was {d}, I misread it
            and the following day?
            do {d} next
        """),
        "units": lines("""
            and {q}?
            the same for {q}
            what about twice that?
            and half of it?
            now {q}, please
            and the other one, {q}?
            {q} too
            and if it were {n}?
            {n} of them then
            also for {q}
            make that {n}
            and ten times as much?
            how about {q}?
            the second one is {n}
            and a third of that?
            and {n} instead?
            sorry, it is {q}
            the next one has {n}
            then {q}
            and with {n} more?
            ---
            and for {n}, same thing
            what would {q} be?
            it is {n} after all
            {q} as well please
            and a quarter of it?
        """),
        "math": lines("""
            and if it were {n} instead?
            what if there were {n} more?
            and after another {n}?
            now with twice as many
            and how many each?
            suppose {n} of them get lost
            and for {n} days?
            what if a friend brings {n}?
            and half of them?
            then {n} more arrive
            and if everybody takes {n}?
            the same with {n}
            what would it be with {n}?
            and when {n} are given away?
            one fewer then?
            and in {n} weeks?
            and with {n} people?
            say it was {n}
            and if they share it?
            now {n} fewer
            ---
            and what comes out with {n}?
            and three times as many?
            make it {n} and try again
            if only {n} come, then?
            and for the other {n}?
        """),
        "sentiment": lines("""
            and this one: "it broke after a day"
            the next one says "could not be better"
            and "meh, would not do it again"?
            what about "five stars from me"
            same for "never again"
            and the second one?
            "well worth it", how about that
            here is another: "waste of money"
            and if they had written "not bad"?
            and the other customer: "simply lovely"
            are you sure about that one?
            "I expected more" as well
            next: "made my week"
            and "it does what it should"?
            then "I want my time back"
            one more, "nothing to complain about"
            and the rest of it is "but my kids love it"
            also "two thumbs up"
            and "left after ten minutes"?
            "better than the last time", same question
            ---
            and "I fell asleep"?
            the last one: "would come again"
            how is "so so" then?
            and "pure joy"
            now "what a let-down"
        """),
        "intent": lines("""
            and this one: "where is it?"
            the same customer writes again: "still nothing"
            and if they say "it never came"?
            next message: "I changed my mind"
            also "please send me the papers for the tax office"
            what about "I cannot get in"
            and the second one?
            another: "it arrived in two pieces"
            and "give it back to me"?
            then "nobody answers me"
            "wrong size, what now", how about that
            here is one more: "stop it, please"
            and where does "my name is spelled wrong" go?
            they add "it is urgent"
            and "I paid twice"?
            now this: "the lid is cracked"
            "can I still change it" too
            one more from today: "who has my parcel"
            and the next in line: "it smells burnt"
            same for "the code does not work"
            ---
            and "I never ordered that"?
            the last one for now: "when do you ship"
            how about "please confirm the amount"
            "it leaks", same question
            and if it only says "help"?
        """),
    }
)
GENERIC: Final = lines("""
    yes, do that
    same in JSON
    ok, go on
    are you sure?
    once more, please
    shorter, please
    why?
    no, the other one
    could you double-check that?
    and in capital letters?
    hm, that looks wrong
    say it again without the explanation
    and the next one?
    exactly, continue
    that is not what I meant
    just the answer, please
    can you put it in one line?
    the second one, please
    please fix it
    what does that mean?
    and as a list?
    I meant all of them
    try again
    good. And the others?
    is that everything?
    ---
    yes please
    not quite, have another look
    and as JSON?
    fine, keep going
    could that be shorter?
""")
"""Follow-ups after any answer."""
TRANSITIONS: Final = lines("""
    thanks, now {p}
    {p}
    Great. {p}
    ok thanks! {p}
    Something else: {p}
    Perfect, that works. Next: {p}
    {p}
    New topic. {p}
    Thank you. {p}
    I have a different question: {p}
    cool, now for something different. {p}
    Got it. {p}
    {p}
    Different matter: {p}
    All right, and then this: {p}
    That helped. {p}
    {p}
    ok, forget that. {p}
    Nice, thanks a lot. {p}
    Leaving that aside: {p}
    ---
    Wonderful, thank you! {p}
    {p}
    Moving on. {p}
    By the way: {p}
    thx. {p}
""")
"""A change of topic: {p} is a whole prompt of another family."""
SYSTEMS: Final = phrases("""
    You are a helpful assistant. Answer briefly. The user may ask about tables in a database, files on a disk or
    orders.;
    You are a coding agent. You can run shell commands, read files, grep for text and list folders. Always explain
    it before you run it.;
    You work for the support desk of a shop. Customers write about refunds, invoices, deliveries and broken items.
    Be polite.;
    You are an expert in data analysis. You write SQL queries over the customer's tables and explain every
    column.;
    You are a friendly assistant of a restaurant. You take reservations: name, number of guests and day.;
    You convert units and dates for engineers. Always give metric units and ISO 8601 dates.;
    You are a review analyst. For every comment decide whether the mood is positive or negative.;
    You are a maths tutor for children. Solve each story step by step.;
    You are an assistant with tools. Use the search tool when you do not know the answer, and cite your sources.;
    Answer in plain text. Never use markdown. Keep every answer below one hundred words.
    ---
    You are a careful assistant. Before each answer, think about which table, file or order the user means.;
    You are the terminal helper of a developer. Prefer short commands and never delete files without asking.;
    You are a booking clerk. Every request becomes a record with guests, name and day.
""")
REMINDERS: Final = phrases("""
    <system-reminder>The todo list is empty. Do not mention this to the user. Files changed since the last turn:
    config.json, main.py.</system-reminder>;
    <system-reminder>As you answer, remember to run the tests, list the files in the folder and count the lines of
    each log.</system-reminder>;
    <environment_details>Current working directory: /home/user/project. Open files: report.csv, notes.txt. Time:
    12 March 2031.</environment_details>;
    <system-reminder>Reminder: the database has the tables orders and customers. Never drop a
    table.</system-reminder>;
    <system-reminder>The user opened the file prices.csv in the editor. This may or may not be related to the
    current task.</system-reminder>;
    <ide_selection>Weight of the parcel: 12 kg. Length: 80 cm. Shipped on the 3rd of May 2029.</ide_selection>;
    <system_warning>Token usage: 48213 of 200000 are used. Answer briefly and do not repeat the files you have
    read.</system_warning>;
    <system-reminder>Plan mode is on. Do not edit files or run commands that change anything.</system-reminder>;
    <environment_context><cwd>/srv/app</cwd><shell>zsh</shell><approval_policy>on-request</approval_policy></environment_context>;
    <system-reminder>The last tool call returned 28 rows. Reply with a refund if the customer asks for
    one.</system-reminder>
    ---
    <system-reminder>Background command 3 finished with exit code 0. Use the output tool to read
    it.</system-reminder>;
    <additional_context>Selected rows 4 to 9 of the table lakes, average depth 41 metres.</additional_context>;
    <system-reminder>Your memory file was updated. Follow its style guide: short sentences, no lists, dates as
    yyyy-mm-dd.</system-reminder>
""")
NAMES: Final = words("Ana Ben Clara Dan Eva Finn Greta Hugo Ida Jan Kim Leo Mona Nils Olga --- Pia Ralf Sven Tara Udo")
THINGS: Final = phrases("""
    ladder; old map; garden hose; red box; tent; kite; desk; lamp; violin; helmet --- anchor; stool; easel; hammock
""")
WORDS: Final = words("north blue pdf oak jazz csv lima txt ruby gold --- teal png nord wool")
FILES: Final = words("a.txt notes.md data.csv old.log work todo.md app.log tmp list.txt img --- x.yaml raw b.tar var")
WEEKDAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
"""A closed class, shared by all splits."""
POOLS: Final[dict[str, Pool]] = {
    **{f"follow_ups_{name}": pool for name, pool in FOLLOW_UPS.items()},
    "generic": GENERIC,
    "systems": SYSTEMS,
    "reminders": REMINDERS,
    "names": NAMES,
    "things": THINGS,
    "words": WORDS,
    "files": FILES,
}
"""Every pool of templates and open-class words, for the tests of disjointness."""
