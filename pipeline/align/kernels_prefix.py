"""The loops of the byte-prefix targets, compiled by numba.

Shapes: S student tokens, T teacher tokens, C chunks, R teacher rows, K kept entries of all rows together, U teacher
vocabulary, M student text tokens in order of (bytes, id), B bytes of all teacher tokens together. A vocabulary is
its bytes one token after the other and the offsets where each starts. All logarithms are natural.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]


@compiled
def _first_at_least(data: Bytes, offsets_M: Offsets, low: int, high: int, depth: int, byte: int) -> int:
    """The first of these tokens whose next byte is ``byte`` or more, ``high`` if none is."""
    while low < high:
        middle = (low + high) // 2
        at = offsets_M[middle] + depth
        # a token that ends here sorts before those that go on
        if at >= offsets_M[middle + 1] or data[at] < byte:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _narrow(data: Bytes, offsets_M: Offsets, low: int, high: int, depth: int, byte: int) -> tuple[int, int]:
    """Of the sorted tokens ``low:high``, which agree in ``depth`` bytes, those that go on with ``byte``."""
    first = _first_at_least(data, offsets_M, low, high, depth, byte)
    return first, _first_at_least(data, offsets_M, first, high, depth, byte + 1)


@compiled
def longest_prefixes(
    teacher: Bytes, teacher_U: Offsets, sorted_student: Bytes, sorted_M: Offsets, id_M: NDArray[np.int32]
) -> NDArray[np.int32]:
    """At every byte of every teacher token the longest student token that the token's rest starts with.

    Args:
        teacher, teacher_U: the teacher's vocabulary.
        sorted_student, sorted_M: the student's text tokens in order.
        id_M: the student id that stands for the bytes of each.

    Returns:
        int32 [B]: student ids, -1 where no student token fits.
    """
    # Walks down the sorted tokens as down a trie: a range that shrinks byte by byte, without building one.
    found_B = np.full(len(teacher), -1, np.int32)
    for token in range(len(teacher_U) - 1):
        end = teacher_U[token + 1]
        for start in range(teacher_U[token], end):
            low, high = 0, len(id_M)
            for at in range(start, end):
                low, high = _narrow(sorted_student, sorted_M, low, high, at - start, int(teacher[at]))
                if low == high:
                    break
                # the shortest of those that agree comes first: if it ends here, it is a prefix, and the longest so far
                if sorted_M[low + 1] - sorted_M[low] == at - start + 1:
                    found_B[start] = id_M[low]
    return found_B


@compiled
def boundary_rows(
    student_end_S: NDArray[np.int32],
    teacher_end_T: NDArray[np.int32],
    chunk_student_C: NDArray[np.int32],
    chunk_teacher_C: NDArray[np.int32],
    start_C: NDArray[np.int64],
    teacher_ids_T: NDArray[np.int32],
    text: Bytes,
    teacher: Bytes,
    teacher_U: Offsets,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Where the teacher stands before each student token of one sample.

    Args:
        student_end_S, teacher_end_T: cumulative byte ends.
        chunk_student_C, chunk_teacher_C: index after each chunk's last token.
        start_C: row of each chunk's first teacher token, negative = none (such a chunk has no targets).
        teacher_ids_T: the teacher's tokens.
        text: the sample's bytes.
        teacher, teacher_U: the teacher's vocabulary.

    Returns:
        row int64 [S] that predicts the teacher token at or across the boundary, -1 = none; that token int32 [S];
        and how many of its bytes lie before the boundary int32 [S], 0 where both sides begin a token.
    """
    row_S = np.full(len(student_end_S), -1, np.int64)
    token_S, before_S = np.zeros(len(student_end_S), np.int32), np.zeros(len(student_end_S), np.int32)
    s = first = 0
    for chunk in range(len(start_C)):
        # within a chunk both sides are walked once: t never goes back
        t = first
        for i in range(s, chunk_student_C[chunk]):
            if start_C[chunk] < 0:
                continue
            if i == s:  # root: both sides begin a token
                row_S[i], token_S[i] = start_C[chunk], teacher_ids_T[first]
                continue
            boundary = student_end_S[i - 1]
            while t < chunk_teacher_C[chunk] and teacher_end_T[t] <= boundary:
                t += 1
            # A token without width lies inside a block whose bytes changed: its own boundary is not known.
            if t == chunk_teacher_C[chunk] or student_end_S[i] == boundary:
                continue
            # Interior: the teacher's token began earlier. Its bytes so far must be those of the text: where a
            # normaliser changed them, what it has emitted is not what the student has.
            begin = teacher_end_T[t - 1] if t else 0
            if _spells(text, begin, boundary, teacher, teacher_U, teacher_ids_T[t]):
                row_S[i], token_S[i] = start_C[chunk] + t - first, teacher_ids_T[t]
                before_S[i] = boundary - begin
        s, first = chunk_student_C[chunk], chunk_teacher_C[chunk]
    return row_S, token_S, before_S


@compiled
def _spells(text: Bytes, begin: int, end: int, vocab: Bytes, offsets: Offsets, token: int) -> bool:
    """Whether a token starts with ``text[begin:end]``, which is at least one byte."""
    if end <= begin or end - begin > offsets[token + 1] - offsets[token]:
        return False
    at = 0
    while at < end - begin and text[begin + at] == vocab[offsets[token] + at]:
        at += 1
    return at == end - begin


@compiled
def prefix_entries(
    row_S: NDArray[np.int64],
    token_S: NDArray[np.int32],
    before_S: NDArray[np.int32],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    rest_R: NDArray[np.float64],
    teacher: Bytes,
    teacher_U: Offsets,
    phi_B: NDArray[np.int32],
    role_U: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64], NDArray[np.float32]]:
    """Root and interior targets: kept teacher tokens as the student tokens that begin what is left of them.

    Args:
        row_S, token_S, before_S: from ``boundary_rows``.
        offsets_R, ids_K, logprob_K, rest_R: rows, normalised with the tail mass.
        teacher, teacher_U: the teacher's vocabulary.
        phi_B: the student token for what is left at each byte, -1 = none (``prefix.first_tokens``).
        role_U: the student's special token for each teacher special, or -1.

    Returns:
        count int32 [S], student ids int32 (which may repeat) and log-probabilities float64 of each target, and the
        log of its tail mass float32 [S]; a token without a target has count 0 and tail 0.
    """
    most = 0
    for row in row_S:
        most += offsets_R[row + 1] - offsets_R[row] if row >= 0 else 0
    count_S, rest_S = np.zeros(len(row_S), np.int32), np.zeros(len(row_S), np.float32)
    out_ids, out_log = np.empty(most, np.int32), np.empty(most, np.float64)
    used = 0
    for i in range(len(row_S)):
        row, skip, own = row_S[i], before_S[i], teacher_U[token_S[i]]
        if row < 0:
            continue
        # at an interior boundary it is not known how much of the tail mass would go on with these bytes
        total, rest, first = 0.0, 0.0 if skip else np.exp(rest_R[row]), used
        for at in range(offsets_R[row], offsets_R[row + 1]):
            token = ids_K[at]
            if skip and not _spells(teacher, own, own + skip, teacher, teacher_U, token):
                continue
            p = np.exp(logprob_K[at])
            to = _begins(token, skip, teacher_U, phi_B, role_U)
            if to < 0:  # the student has no token that begins what is left: some other token has this mass
                rest += p
            else:
                total += p
                out_ids[used], out_log[used] = to, logprob_K[at]
                used += 1
        if total > 0:
            count_S[i] = used - first
            rest_S[i] = np.log(rest / (rest + total)) if rest > 0 else -np.inf
            out_log[first:used] -= np.log(rest + total)
        else:  # no entry has a student token: the ones written are taken back, there are none
            used = first
    return count_S, out_ids[:used], out_log[:used], rest_S


@compiled
def _begins(token: int, skip: int, teacher_U: Offsets, phi_B: NDArray[np.int32], role_U: NDArray[np.int32]) -> int:
    """The student token for a teacher token without its first ``skip`` bytes, -1 = none."""
    at = teacher_U[token] + skip
    if at < teacher_U[token + 1]:
        return int(phi_B[at])
    return -1 if skip else int(role_U[token])


@compiled
def child_entries(
    row_S: NDArray[np.int64],
    before_S: NDArray[np.int32],
    student_ids_S: NDArray[np.int32],
    last_S: NDArray[np.bool_],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    teacher: Bytes,
    teacher_U: Offsets,
    rank_U: NDArray[np.int32],
    alone_U: NDArray[np.bool_],
    student: Bytes,
    student_V: Offsets,
    sorted_student: Bytes,
    sorted_M: Offsets,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Child targets: groups of teacher tokens that the student's label has begun to spell.

    Args:
        row_S, before_S: from ``boundary_rows``.
        student_ids_S: the student's tokens.
        last_S: nothing of a chunk comes behind the token: it is the last of its sample, or before a gap.
        offsets_R, ids_K, logprob_K: rows, normalised with the tail mass.
        teacher, teacher_U: the teacher's vocabulary.
        rank_U: each teacher token's place in the order of bytes.
        alone_U: a teacher text token without a student token of equal bytes.
        student, student_V: the student's vocabulary by id.
        sorted_student, sorted_M: its text tokens in order.

    Returns:
        Groups of each token int32 [S]; of each group the range of student tokens that start with its next bytes, two
        int32, and the log of its mass, float32.
    """
    most = 0
    for row in row_S:
        most += offsets_R[row + 1] - offsets_R[row] if row >= 0 else 0
    count_S = np.zeros(len(row_S), np.int32)
    out_low, out_high, mass = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.float32)
    used = 0
    for i in range(len(row_S)):
        begin, end = student_V[student_ids_S[i]], student_V[student_ids_S[i] + 1]
        # a group belongs to the token after, so only roots that are not the last have any; specials spell nothing
        if row_S[i] < 0 or before_S[i] or last_S[i] or begin == end:
            continue
        low, high = offsets_R[row_S[i]], offsets_R[row_S[i] + 1]
        # a teacher token with a twin has its mass in the root's own target
        kept = alone_U[ids_K[low:high]]
        shortest_g, total_g = _groups(ids_K[low:high][kept], logprob_K[low:high][kept], rank_U, teacher, teacher_U)
        for group in range(len(shortest_g)):
            token = shortest_g[group]
            # at least one byte is left, as a token of equal bytes would be a twin
            if not _spells(student, begin, end, teacher, teacher_U, token):
                continue
            left = teacher[teacher_U[token] + end - begin : teacher_U[token + 1]]
            first, after = _range(left, sorted_student, sorted_M)
            if first < after and total_g[group] > 0:
                out_low[used], out_high[used], mass[used] = first, after, np.log(total_g[group])
                # counted at the token that comes next, which spells on
                count_S[i + 1] += 1
                used += 1
    return count_S, out_low[:used], out_high[:used], mass[:used]


@compiled
def _groups(
    ids: NDArray[np.int32], logprob: NDArray[np.float64], rank_U: NDArray[np.int32], teacher: Bytes, teacher_U: Offsets
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Tokens joined to the shortest among them that they start with: that token, and the mass of each group."""
    shortest_g, total_g = np.empty(len(ids), np.int32), np.zeros(len(ids), np.float64)
    groups = 0
    # Sorted by bytes, what starts with a token follows it without a gap.
    for at in np.argsort(rank_U[ids]):
        token = shortest_g[groups - 1] if groups else ids[at]
        begin, end = teacher_U[token], teacher_U[token + 1]
        if not groups or not _spells(teacher, begin, end, teacher, teacher_U, ids[at]):
            shortest_g[groups] = ids[at]
            groups += 1
        total_g[groups - 1] += np.exp(logprob[at])
    return shortest_g[:groups], total_g[:groups]


@compiled
def _range(prefix: Bytes, sorted_student: Bytes, sorted_M: Offsets) -> tuple[int, int]:
    """The sorted tokens that start with ``prefix``."""
    low, high = 0, len(sorted_M) - 1
    for depth in range(len(prefix)):
        low, high = _narrow(sorted_student, sorted_M, low, high, depth, int(prefix[depth]))
    return low, high
