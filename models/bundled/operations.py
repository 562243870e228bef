"""What the one-line functions of the synthetic tasks compute. Data and its reader.

A group in brackets says what the parameters are. An operation is a line of
names (with, after a colon, the ranges of its constants `{k}` and `{j}`),
descriptions separated by semicolons, and the expression after an equals sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Inputs = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What to compute: `{a}` to `{c}` are parameters, `{k}`, `{j}` constants.

    `params` are the sets of names to call the parameters by; `inputs` the
    argument tuples on which an answer is compared with the reference.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    expression: str
    params: tuple[str, ...]
    inputs: Inputs
    constants: tuple[tuple[int, int], ...] = ()


_PARAMS: dict[str, str] = {
    "number": "x; n; a; num; value; y; m; k",
    "pair": "a b; x y; n m; p q; left right; first second; u v",
    "triple": "a b c; x y z; p q r; u v w",
    "list": "xs; items; values; numbers; data; nums; lst",
    "text": "s; text; string; line; name",
    "text+": "s; text; string; line; name",
    "words": "words; names; strings; parts; lines",
}
_INPUTS: dict[str, Inputs] = {
    "number": ((0,), (1,), (2,), (7,), (-3,), (12,), (15,), (-20,), (90,)),
    "pair": ((3, 4), (4, 3), (-2, 5), (9, 3), (7, 7), (-6, -1), (10, 3)),
    "triple": ((1, 2, 3), (5, -4, 2), (9, 9, 1), (-3, -1, -2), (4, 6, 5)),
    "list": (([3, 1, 2],), ([5],), ([-1, 4, 4, 0],), ([10, -7, 8, 8, 3, 2],), ([12, 90, 33],)),
    "text": (("hello world",), ("Abc",), ("",), ("level",), ("A bad banana",)),
    "text+": (("hello world",), ("Abc",), ("level",), ("A bad banana",)),
    "words": ((["pear", "fig", "banana"],), (["a"],), (["Zoe", "adam", "Bo", "Bo"],)),
}

_TABLE = """
[number]
square squared
    returns the square of {a}; squares {a}; returns {a} squared
    = {a} * {a}
cube cubed
    returns the cube of {a}; returns {a} cubed
    = {a} ** 3
double twice
    returns twice {a}; doubles {a}; returns {a} times two
    = {a} * 2
negate opposite
    returns the opposite of {a}; negates {a}
    = -{a}
absolute magnitude
    returns the absolute value of {a}
    = abs({a})
is_even even
    checks if {a} is even; returns whether {a} is even
    = {a} % 2 == 0
is_odd odd
    checks if {a} is odd; returns whether {a} is odd
    = {a} % 2 == 1
is_positive positive
    checks if {a} is positive; returns whether {a} is positive
    = {a} > 0
is_negative negative
    checks if {a} is negative; returns whether {a} is negative
    = {a} < 0
is_zero zero
    checks if {a} is zero; returns whether {a} is zero
    = {a} == 0
to_text text_of
    converts {a} to a string; returns {a} as a string
    = str({a})
increment next_one
    returns {a} plus one; increments {a}
    = {a} + 1
decrement previous
    returns {a} minus one; decrements {a}
    = {a} - 1
add_k plus increase : 2-20
    adds {k} to {a}; returns {a} plus {k}; increases {a} by {k}
    = {a} + {k}
minus reduce_by : 2-20
    subtracts {k} from {a}; returns {a} minus {k}
    = {a} - {k}
scale times : 2-20
    multiplies {a} by {k}; returns {a} times {k}
    = {a} * {k}
divide over : 2-20
    divides {a} by {k}; returns {a} divided by {k}
    = {a} / {k}
remainder mod : 2-20
    returns the remainder of {a} divided by {k}; returns {a} modulo {k}
    = {a} % {k}
divisible is_multiple : 2-20
    checks if {a} is divisible by {k}; checks if {a} is a multiple of {k}
    = {a} % {k} == 0
above is_greater : 2-20
    checks if {a} is greater than {k}; returns whether {a} is above {k}
    = {a} > {k}
below is_less : 2-20
    checks if {a} is less than {k}; returns whether {a} is below {k}
    = {a} < {k}
linear affine : 2-20 1-20
    multiplies {a} by {k} and adds {j}; returns {k} times {a} plus {j}
    = {k} * {a} + {j}
clip at_most : 2-20
    returns the smaller of {a} and {k}; limits {a} to at most {k}
    = min({a}, {k})
floor_at at_least : 2-20
    returns the larger of {a} and {k}; makes {a} at least {k}
    = max({a}, {k})

[pair]
add sum_of total
    returns the sum of {a} and {b}; adds {a} and {b}; returns {a} plus {b}
    = {a} + {b}
subtract difference
    returns the difference of {a} and {b}; subtracts {b} from {a}; returns {a} minus {b}
    = {a} - {b}
multiply product
    returns the product of {a} and {b}; multiplies {a} by {b}; returns {a} times {b}
    = {a} * {b}
divide quotient
    divides {a} by {b}; returns {a} divided by {b}
    = {a} / {b}
int_divide whole
    returns the integer quotient of {a} and {b}
    = {a} // {b}
mod remainder
    returns the remainder of {a} divided by {b}; returns {a} modulo {b}
    = {a} % {b}
largest maximum
    returns the larger of {a} and {b}; returns the maximum of {a} and {b}
    = max({a}, {b})
smallest minimum
    returns the smaller of {a} and {b}; returns the minimum of {a} and {b}
    = min({a}, {b})
mean average
    returns the average of {a} and {b}; returns the mean of {a} and {b}
    = ({a} + {b}) / 2
equal same
    checks if {a} equals {b}; returns whether {a} and {b} are equal
    = {a} == {b}
greater is_more
    checks if {a} is greater than {b}; returns whether {a} is greater than {b}
    = {a} > {b}
less is_less
    checks if {a} is less than {b}; returns whether {a} is less than {b}
    = {a} < {b}
distance gap
    returns the distance between {a} and {b}; returns the absolute difference of {a} and {b}
    = abs({a} - {b})
divides is_multiple
    checks if {a} is divisible by {b}; checks if {a} is a multiple of {b}
    = {a} % {b} == 0

[triple]
add_three sum_all
    returns the sum of {a}, {b} and {c}; adds {a}, {b} and {c}
    = {a} + {b} + {c}
product_of
    returns the product of {a}, {b} and {c}; multiplies {a}, {b} and {c}
    = {a} * {b} * {c}
biggest max_three
    returns the largest of {a}, {b} and {c}
    = max({a}, {b}, {c})
least min_three
    returns the smallest of {a}, {b} and {c}
    = min({a}, {b}, {c})
between in_range
    checks if {a} is between {b} and {c}
    = {b} <= {a} <= {c}

[list]
total sum_list
    returns the sum of {a}; adds up the numbers in {a}
    = sum({a})
size length
    returns the length of {a}; returns how many items {a} has
    = len({a})
largest biggest
    returns the largest number in {a}; returns the maximum of {a}
    = max({a})
smallest least
    returns the smallest number in {a}; returns the minimum of {a}
    = min({a})
mean average
    returns the average of {a}; returns the mean of {a}
    = sum({a}) / len({a})
sort ordered
    returns {a} sorted; sorts {a}
    = sorted({a})
backwards reverse_list
    returns {a} reversed; reverses {a}
    = {a}[::-1]
first head
    returns the first item of {a}; returns the first element of {a}
    = {a}[0]
last tail
    returns the last item of {a}; returns the last element of {a}
    = {a}[-1]
evens only_even
    returns the even numbers in {a}; keeps the even numbers of {a}
    = [x for x in {a} if x % 2 == 0]
odds only_odd
    returns the odd numbers in {a}; keeps the odd numbers of {a}
    = [x for x in {a} if x % 2 == 1]
positives only_positive
    returns the positive numbers in {a}; keeps the positive numbers of {a}
    = [x for x in {a} if x > 0]
squares square_all
    returns the squares of the numbers in {a}; squares every number in {a}
    = [x * x for x in {a}]
scale_all times_all : 2-20
    multiplies every number in {a} by {k}; returns each number in {a} times {k}
    = [x * {k} for x in {a}]
add_all shift : 2-20
    adds {k} to every number in {a}; returns each number in {a} plus {k}
    = [x + {k} for x in {a}]
above keep_above : 2-20
    returns the numbers in {a} greater than {k}; keeps the numbers of {a} above {k}
    = [x for x in {a} if x > {k}]
below keep_below : 2-20
    returns the numbers in {a} less than {k}; keeps the numbers of {a} below {k}
    = [x for x in {a} if x < {k}]
contains has : 2-20
    checks if {k} is in {a}; returns whether {a} contains {k}
    = {k} in {a}
unique distinct
    returns the number of different items in {a}
    = len(set({a}))

[text]
upper shout
    converts {a} to upper case; returns {a} in upper case
    = {a}.upper()
lower whisper
    converts {a} to lower case; returns {a} in lower case
    = {a}.lower()
reverse flipped
    reverses the string {a}; returns the string {a} reversed
    = {a}[::-1]
length size
    returns the number of characters in {a}
    = len({a})
word_count num_words
    counts the words in {a}; returns the number of words in {a}
    = len({a}.split())
split_words words_of
    splits {a} into words; returns the list of words in {a}
    = {a}.split()
is_palindrome palindrome
    checks if {a} is a palindrome; returns whether {a} is a palindrome
    = {a} == {a}[::-1]
is_empty empty
    checks if {a} is empty; returns whether {a} is empty
    = len({a}) == 0
repeat copies : 2-9
    repeats {a} {k} times; returns {a} repeated {k} times
    = {a} * {k}

[text+]
first_char initial
    returns the first character of {a}
    = {a}[0]
last_char final
    returns the last character of {a}
    = {a}[-1]

[words]
join_words joined
    joins {a} with spaces; returns {a} joined with spaces
    = ' '.join({a})
upper_all shout_all
    converts every word in {a} to upper case; returns the words in {a} in upper case
    = [w.upper() for w in {a}]
lengths sizes
    returns the length of each word in {a}
    = [len(w) for w in {a}]
longest longest_word
    returns the longest word in {a}
    = max({a}, key=len)
shortest shortest_word
    returns the shortest word in {a}
    = min({a}, key=len)
long_words longer : 2-6
    returns the words in {a} longer than {k} letters;
    keeps the words of {a} with more than {k} letters
    = [w for w in {a} if len(w) > {k}]
"""


def _bounds(text: str) -> tuple[int, int]:
    low, high = text.split("-")
    return int(low), int(high)


def _parsed(table: str) -> Iterator[Operation]:
    group, header, descriptions = "", "", ""
    for line in table.strip().splitlines():
        body = line.strip()
        if body.startswith("["):
            group = body.strip("[]")
        elif not line.startswith(" "):
            header, descriptions = body, ""
        elif not body.startswith("= "):
            descriptions += " " + body
        else:
            names, _, constants = header.partition(" : ")
            yield Operation(
                names=tuple(names.split()),
                descriptions=tuple(part.strip() for part in descriptions.split(";")),
                expression=body[2:],
                params=tuple(_PARAMS[group].split("; ")),
                inputs=_INPUTS[group],
                constants=tuple(map(_bounds, constants.split())),
            )


OPERATIONS: tuple[Operation, ...] = tuple(_parsed(_TABLE))
