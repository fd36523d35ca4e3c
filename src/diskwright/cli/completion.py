"""Completion scripts for bash and zsh.

Both shells run the same functions, written in what they have in common: tables made of the command line's
description, and ``__diskwright_complete``, which finds out from the words so far what can come next. Only the last
step, handing that to the shell, is each shell's own. Lists are texts with a word a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from diskwright.cli import describe
from diskwright.cli.describe import CommandText, OptionText
from diskwright.cli.faces import FACES, OWN_NAME

_ENGINE: Final = r"""
# Sets __dw_words to what may come last, __dw_files when a file name may, and __dw_before to what of the last word
# stands before the part that is completed. $1: the one subcommand of this program, or ''; then the words.
__diskwright_complete() {
    local command="$1" previous= literal= source= target= word= rest=
    shift
    __dw_words= __dw_files= __dw_before= __dw_kind=
    while [ $# -gt 1 ]; do
        word="$1"
        shift
        if [ -n "$literal" ]; then
            continue
        elif [ -z "$command" ]; then
            command="$word"
        elif [ -n "$previous" ]; then
            case "$previous" in
                -f|--format) source="$word" ;;
                -O|--target-format) target="$word" ;;
            esac
            previous=
        elif [ "$word" = -- ]; then
            literal=1
        else
            case "$word" in
                --format=*) source="${word#*=}" ;;
                --target-format=*) target="${word#*=}" ;;
                --*=*) ;;
                -*)
                    __diskwright_value "$command" "$word"
                    if [ -n "$__dw_kind" ]; then previous="$word"; fi
                    ;;
            esac
        fi
    done
    word="$1" __dw_kind= __dw_words=
    if [ -z "$command" ]; then
        __diskwright_commands
        return
    elif [ -n "$literal" ]; then
        __dw_files=1
        return
    elif [ -n "$previous" ]; then
        __diskwright_value "$command" "$previous"
    else
        case "$word" in
            --*=*)
                __diskwright_value "$command" "${word%%=*}"
                if [ -z "$__dw_kind" ]; then __diskwright_value "$command" "${word%%=*}="; fi
                __dw_before="${word%%=*}="
                word="${word#*=}"
                if [ -z "$__dw_kind" ]; then return; fi
                ;;
            -*) __diskwright_options "$command" ;;
            *) __diskwright_operand "$command" "$word" ;;
        esac
    fi
    case "$__dw_kind" in
        format) __diskwright_formats ;;
        file) __dw_files=1 ;;
        keys)
            case "$word" in
                *,*)
                    rest="${word##*,}"
                    __dw_before="$__dw_before${word%,*},"
                    ;;
                *) rest="$word" ;;
            esac
            case "$command" in
                create) target="${source:-raw}" ;;
                amend) target="${source:-qcow2}" ;;
                *) target="${target:-raw}" ;;
            esac
            case "$rest" in
                *=*)
                    __diskwright_key "$command" "$target" "${rest%%=*}"
                    __dw_before="$__dw_before${rest%%=*}="
                    ;;
                *) __diskwright_keys "$command" "$target" ;;
            esac
            ;;
    esac
}
"""

_BASH: Final = r"""
_diskwright() {
    local only= word= glue= i= cur= raw= found= skip=
    local line
    line=()
    __diskwright_program "${COMP_WORDS[0]##*/}"
    only="$__dw_words"
    # bash has cut the words at the characters of COMP_WORDBREAKS: they are put together again.
    for ((i = 1; i <= COMP_CWORD; i++)); do
        word="${COMP_WORDS[i]}"
        if [[ ${#line[@]} -gt 0 && $word == [=:]* ]]; then
            line[${#line[@]}-1]+="$word"
            glue=1
        elif [[ -n $glue ]]; then
            line[${#line[@]}-1]+="$word"
            glue=
        else
            line+=("$word")
        fi
    done
    raw="${COMP_WORDS[COMP_CWORD]}"
    if [[ $raw == [=:]* ]]; then raw=; fi
    cur="${line[${#line[@]}-1]}"
    # What readline does not replace is not in the replies.
    skip=$((${#cur} - ${#raw}))
    __diskwright_complete "$only" "${line[@]}"
    COMPREPLY=()
    while IFS= read -r found; do
        if [[ -n $found && $__dw_before$found == "$cur"* ]]; then
            found="$__dw_before$found"
            COMPREPLY+=("${found:skip}")
            if [[ $found == *= ]]; then compopt -o nospace 2>/dev/null; fi
        fi
    done <<< "$__dw_words"
    if [[ -n $__dw_files ]]; then
        compopt -o filenames 2>/dev/null
        while IFS= read -r found; do
            found="$__dw_before$found"
            COMPREPLY+=("${found:skip}")
        done < <(compgen -f -- "${cur#"$__dw_before"}")
    fi
}
"""

_ZSH: Final = r"""
_diskwright() {
    local only
    local -a found pairs
    __diskwright_program "${words[1]:t}"
    only="$__dw_words"
    __diskwright_complete "$only" "${(@)words[2,CURRENT-1]}" "$PREFIX"
    if [[ -n $__dw_before ]]; then compset -p ${#__dw_before}; fi
    found=(${(f)__dw_words})
    pairs=(${(M)found:#*=})
    found=(${found:#*=})
    if (( ${#pairs} )); then compadd -S '' -- "${(@)pairs}"; fi
    if (( ${#found} )); then compadd -- "${(@)found}"; fi
    if [[ -n $__dw_files ]]; then _files; fi
}
"""

# zsh reads the file as the function's body when it found it by itself, and as a script when it was told to.
_ZSH_END: Final = """\
if [ "$funcstack[1]" = _diskwright ]; then
    _diskwright "$@"
else
    compdef _diskwright {}
fi
"""


def script(shell: str) -> str:
    """The completion script for ``bash`` or ``zsh``."""
    found = describe.commands()
    names = " ".join([OWN_NAME, *_faces(found)])
    shared = "\n".join((_tables(found), _ENGINE.strip("\n")))
    if shell == "bash":
        return f"# bash completion for {OWN_NAME}\n{shared}\n{_BASH}\ncomplete -F _diskwright {names}\n"
    end = (
        f'if [ "$funcstack[1]" = _diskwright ]; then\n    _diskwright "$@"\nelse\n    compdef _diskwright {names}\nfi\n'
    )
    return f"#compdef {names}\n{shared}\n{_ZSH}\n{end}"


def _faces(found: list[CommandText]) -> list[str]:
    """The names this program answers to whose command line is described."""
    names = {command.name for command in found if command.options}
    return [face.name for face in FACES.values() if face.only is None or face.only in names]


def _tables(found: list[CommandText]) -> str:
    names = {command.name for command in found if command.options}
    programs = {face.name: face.only for face in FACES.values() if face.only in names}
    commands = [*(command.name for command in found), "--help", "--version"]
    values: dict[str, list[str]] = {}
    for command in found:
        for option in command.options:
            if option.value:
                words = f" __dw_words={_list(option.words)}" if option.words else ""
                values.setdefault(f"__dw_kind={option.kind}{words}", []).extend(
                    f"{command.name} {name}{'=' if option.optional else ''}" for name in option.names
                )
    value_rows = [f"        {'|'.join(map(_quoted, keys))}) {do} ;;" for do, keys in values.items()]
    options = {
        command.name: [name for option in command.options for name in _offered(option)]
        for command in found
        if command.options
    }
    keys = {command.name: describe.keys(amends=command.amends) for command in found if _has_keys(command)}
    key_rows: dict[str, list[str]] = {}
    word_rows: dict[str, list[str]] = {}
    for name, formats in keys.items():
        for format, rows in formats.items():
            key_rows[f"{name} {format}"] = [f"{row.name}=" for row in rows]
            word_rows.update({f"{name} {format} {row.name}": list(row.words) for row in rows if row.words})
    return "\n".join(
        (
            _function("program", '"$1"', programs),
            f"__diskwright_commands() {{\n    __dw_words={_list(commands)}\n}}",
            f"__diskwright_formats() {{\n    __dw_words={_list(describe.format_names())}\n}}",
            _function("options", '"$1"', options),
            '__diskwright_value() {\n    __dw_kind= __dw_words=\n    case "$1 $2" in\n'
            + "\n".join(value_rows)
            + "\n    esac\n}",
            _operands(found),
            _function("keys", '"$1 $2"', key_rows),
            _function("key", '"$1 $2 $3"', word_rows),
        )
    )


def _offered(option: OptionText) -> list[str]:
    values = [f"{name}={word}" for name in option.names for word in option.words] if option.optional else []
    return [*option.names, *values]


def _has_keys(command: CommandText) -> bool:
    return any(option.kind == describe.KEYS for option in command.options)


def _operands(found: list[CommandText]) -> str:
    """What stands where no option does: words or ``name=`` where a command has these, else file names."""
    rows = []
    for command in found:
        for operand in command.operands:
            if operand.words:
                rows.append(f"        {_quoted(command.name)}' '*) __dw_words={_list(operand.words)} ;;")
            elif operand.pairs:
                for key, kind in operand.pairs.items():
                    then = "__dw_files=1 " if kind == describe.FILE else ""
                    rows.append(f"        {_quoted(f'{command.name} {key}=')}*) {then}__dw_before='{key}=' ;;")
                pairs = [f"{key}=" for key in operand.pairs]
                rows.append(f"        {_quoted(command.name)}' '*) __dw_words={_list(pairs)} ;;")
    body = "\n".join([*rows, "        *) __dw_files=1 ;;"])
    return f'__diskwright_operand() {{\n    case "$1 $2" in\n{body}\n    esac\n}}'


def _function(name: str, subject: str, rows: Mapping[str, str | Iterable[str] | None]) -> str:
    """A function that sets ``__dw_words`` to the list that belongs to its arguments."""
    texts = []
    for key, value in rows.items():
        words = [value] if isinstance(value, str) else list(value or ())
        texts.append(f"        {_quoted(key)}) __dw_words={_list(words)} ;;")
    # bash 3 wants at least one pattern.
    texts.append("        *) ;;")
    return f"__diskwright_{name}() {{\n    __dw_words=\n    case {subject} in\n" + "\n".join(texts) + "\n    esac\n}"


def _list(words: Iterable[str]) -> str:
    return _quoted("\n".join(words))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
