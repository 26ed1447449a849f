"""What each shell reads. Candidates are whole words, such as ``--trainer.max_epochs=``."""

from __future__ import annotations

__all__ = ["SCRIPTS"]

# bash takes `=` for the end of a word, and replaces what comes after it alone
_BASH = """\
_fulgurite() {
    local line=${COMP_LINE:0:COMP_POINT} candidate
    local word=${line##*[[:space:]]}
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ $word == *=* ]] && candidate=${candidate#"${word%%=*}="}
        COMPREPLY+=("$candidate")
    done < <(fulgurite completion --line "$line" 2>/dev/null)
    if [[ ${COMPREPLY[0]-} == *[.=] ]]; then compopt -o nospace; fi
}
complete -o default -F _fulgurite fulgurite
"""

_ZSH = """\
_fulgurite() {
    local -a candidates open closed
    candidates=("${(@f)$(fulgurite completion --line "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    open=(${(M)candidates:#*[.=]})
    closed=(${candidates:#*[.=]})
    (( $#open )) && compadd -S '' -- $open
    (( $#closed )) && compadd -- $closed
    (( $#open + $#closed )) || _files
}
compdef _fulgurite fulgurite
"""

_FISH = """\
complete -c fulgurite -a '(fulgurite completion --line (commandline -cp) 2>/dev/null)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
