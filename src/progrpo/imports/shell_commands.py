"""The commands of a shell script, with each word after expansion. Nothing is run."""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass

from progrpo.imports.shell_arithmetic import whole_number

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OPENING = ("if", "for", "while", "until", "case", "select", "{")
_CLOSING = ("fi", "done", "esac", "}")
_BEGINNING = ("then", "else", "do", "elif", "export", "local", "readonly", "declare", "exec", "!", "time")
_DOCUMENT = re.compile(r"<<-?[ \t]*(['\"]?)(\w+)\1")
_MOST_WORDS = 10_000
_LONGEST = 10_000
_MOST_DEPTH = 16


@dataclass(frozen=True)
class Word:
    """A word of a command after expansion. `unread`: a part of it could not be read, and `text` is as it stands."""

    text: str
    unread: bool = False


Variable = list[Word] | None
"""The words of a variable's value; None where it could not be read."""


class Shell:
    """A script's commands, one after the other, with the variables that its assignments set."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.variables: dict[str, Variable] = {"HOME": [Word("~")]}
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._documents: list[str] = []
        self._depth = 0
        self._words = 0

    def commands(self) -> list[tuple[int, list[Word]]]:
        """Each command's line in the script and its words. ValueError for a script whose text cannot be split."""
        commands = []
        while self.at < len(self.text):
            line = bisect(self._newlines, self.at) + 1
            words = self._command()
            words = self._after_keywords(words)
            rest = self._after_assignments(words)
            if rest:
                commands.append((line, rest))
        return commands

    def _after_keywords(self, words: list[Word]) -> list[Word]:
        while words and words[0].text in (*_OPENING, *_CLOSING, *_BEGINNING):
            word = words.pop(0).text
            self._depth += (word in _OPENING) - (word in _CLOSING)
        return words

    def _after_assignments(self, words: list[Word]) -> list[Word]:
        """Set the variables of the assignments with which a command begins."""
        while words and (assignment := _ASSIGNMENT.fullmatch(words[0].text)):
            word = words.pop(0)
            known = not word.unread and self._depth == 0
            self.variables[assignment.group(1)] = [Word(assignment.group(2))] if known else None
        return words

    # --- words --------------------------------------------------------------------------------------------------------

    def _command(self) -> list[Word]:
        """The words up to the end of a command."""
        words: list[Word] = []
        while self.at < len(self.text):
            character = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif character in " \t\r":
                self.at += 1
            elif character == "#":
                self.at = self._find("\n")
            elif character in "\n;&|()":
                self.at += 1
                if character == "\n":
                    self._skip_documents()
                if words:
                    break
            elif document := _DOCUMENT.match(self.text, self.at):
                self.at = document.end()
                self._documents.append(document.group(2))
            elif character in "<>":
                self.at += 1
                if not self.text.startswith("(", self.at):
                    self._skip_blanks()
                    self._word()  # the file of a redirection
            else:
                words += self._array_or_word()
        return words

    def _skip_documents(self) -> None:
        """Move behind the texts of the line's `<<` redirections."""
        while self._documents:
            end = re.compile(rf"^\t*{self._documents.pop(0)}$", re.MULTILINE).search(self.text, self.at)
            self.at = end.end() if end else len(self.text)

    def _skip_blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t&>":
            self.at += 1

    def _find(self, end: str) -> int:
        index = self.text.find(end, self.at)
        return len(self.text) if index < 0 else index

    def _array_or_word(self) -> list[Word]:
        self._words += 1
        if self._words > _MOST_WORDS:
            raise ValueError(f"it has more than {_MOST_WORDS:,} words")
        array = re.compile(r"([A-Za-z_]\w*)(\+?)=\(").match(self.text, self.at)
        if array is None:
            return self._word()
        self.at = array.end()
        items: list[Word] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] in " \t\r\n" or self.text.startswith("\\\n", self.at):
                self.at += 2 if self.text[self.at] == "\\" else 1
            elif self.text[self.at] == "#":
                self.at = self._find("\n")
            elif self.text[self.at] in "(;&|<>":
                raise ValueError(f"the array {array.group(1)} has no end")
            else:
                items += self._word()
        self.at += 1
        before = self.variables.get(array.group(1), []) if array.group(2) else []
        known = self._depth == 0 and before is not None
        self.variables[array.group(1)] = [*before, *items] if known and before is not None else None
        return []

    def _word(self) -> list[Word]:
        """The word at this place; several if it is an array, none if it is the script's own arguments."""
        start = self.at
        text, unread = "", False
        while self.at < len(self.text) and self.text[self.at] not in " \t\r\n;&|()<>":
            character = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                break
            spread = re.compile(r'"?\$\{(\w+)\[@\]\}"?|"?\$@"?|"?\$\*"?').match(self.text, self.at)
            if spread and self.at == start:
                self.at = spread.end()
                name = spread.group(1)
                if name is None:
                    return []
                words = self.variables.get(name, [])
                return [Word(spread.group(), True)] if words is None else words
            if character == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise ValueError("a quotation has no end")
                text += self.text[self.at + 1 : end]
                self.at = end + 1
            elif character == '"':
                quoted, missed = self._quotation()
                text, unread = text + quoted, unread or missed
            elif character == "\\":
                text += self.text[self.at + 1 : self.at + 2]
                self.at += 2
            else:
                part, missed = self._part()
                text, unread = text + part, unread or missed
        if self.at == start:
            self.at += 1  # a character that begins no word
        raw = self.text[start : self.at]
        return [Word(raw[:_LONGEST], True) if unread else Word(text)]

    def _quotation(self) -> tuple[str, bool]:
        """The text in double quotes, and whether a part of it could not be read."""
        text, unread = "", False
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != '"':
            character = self.text[self.at]
            if character == "\\":
                following = self.text[self.at + 1 : self.at + 2]
                text += "" if following == "\n" else following if following in '"\\$`' else character + following
                self.at += 2
            else:
                part, missed = self._part()
                text, unread = text + part, unread or missed
        if self.at >= len(self.text):
            raise ValueError("a quotation has no end")
        self.at += 1
        return text, unread

    def _part(self) -> tuple[str, bool]:
        """The value of an expansion, or the character, at this place; and whether it could not be read."""
        if self.text[self.at] in "$`":
            return self._expansion()
        self.at += 1
        return self.text[self.at - 1], False

    # --- expansions ---------------------------------------------------------------------------------------------------

    def _expansion(self) -> tuple[str, bool]:
        """The value at a dollar or a backtick, and whether it could not be read."""
        if self.text[self.at] == "`":
            self.at += 1
            self.at = self._find("`") + 1
            return "", True
        if self.text.startswith("$((", self.at):
            inside = self._enclosed(3, "(", ")")
            self.at += 1
            return self._number(inside)
        if self.text.startswith("$(", self.at):
            self._enclosed(2, "(", ")")
            return "", True
        if self.text.startswith("${", self.at):
            return self._braces(self._enclosed(2, "{", "}"), 0)
        name = re.compile(r"\$([A-Za-z_]\w*)").match(self.text, self.at)
        if name is None:
            self.at += 2 if self.text[self.at + 1 : self.at + 2].isprintable() else 1
            return "", True
        self.at = name.end()
        return self._value(name.group(1))

    def _enclosed(self, skip: int, opening: str, closing: str) -> str:
        """The text up to the bracket that closes the one before it; the place moves behind it."""
        start = i = self.at + skip
        depth = 1
        while i < len(self.text):
            depth += (self.text[i] == opening) - (self.text[i] == closing)
            if depth == 0:
                self.at = i + 1
                return self.text[start:i]
            i += 1
        raise ValueError("a bracket has no end")

    def _value(self, name: str) -> tuple[str, bool]:
        words = self.variables.get(name)
        return (" ".join(word.text for word in words), any(w.unread for w in words)) if words else ("", True)

    def _braces(self, inside: str, depth: int) -> tuple[str, bool]:
        """The value of `${...}` with this text inside."""
        parsed = re.fullmatch(r"([A-Za-z_]\w*)(?::?([-=])(.*))?", inside, re.DOTALL)
        if parsed is None or depth > _MOST_DEPTH:
            return "", True
        name, sign, default = parsed.groups()
        if name in self.variables or not sign:
            return self._value(name)
        return self._expanded(default, depth + 1)

    def _expanded(self, text: str, depth: int) -> tuple[str, bool]:
        """A default's text with its own expansions."""
        if depth > _MOST_DEPTH:
            return "", True
        inner = Shell(f'"{text}"' if '"' not in text else text)
        inner.variables = self.variables
        words = inner._word() if inner.text else []
        return (words[0].text, words[0].unread) if len(words) == 1 else ("", True)

    def _number(self, inside: str) -> tuple[str, bool]:
        """The whole number that an arithmetic expression means."""
        unread = False

        def value_of(match: re.Match[str]) -> str:
            nonlocal unread
            value, missed = self._value(match.group(1))
            unread = unread or missed
            return value

        text = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", value_of, inside)
        value = None if unread else whole_number(text)
        return ("", True) if value is None else (str(value), False)
