#include <algorithm>
#include <utility>

#include "scheduler_impl.hpp"

namespace less {

int64_t Scheduler::Impl::freeRow(int64_t but) const {
    int64_t row = 0;
    while (row == but || taken(row)) ++row;
    return row;
}

bool Scheduler::Impl::taken(int64_t row) const {
    return std::any_of(decoding_.begin(), decoding_.end(), [=](Ref const& s) { return s->row == row; }) ||
           std::any_of(prefilling_.begin(), prefilling_.end(), [=](Prefill const& p) { return p.row == row; });
}

Outcome Scheduler::Impl::lose(Prefill const& prefill, std::string const& error) {
    prefill.leader().row.reset();
    waiting_.insert(waiting_.begin(), prefill.sequences.begin() + 1, prefill.sequences.end());
    return failed(prefill.sequences.front(), error);
}

std::vector<Ref> Scheduler::Impl::join(Prefill const& prefill, Outcomes& errors) {
    std::vector<Ref> joined;
    int64_t source = prefill.row;
    size_t const fed = prefill.leader().fed;
    for (Ref const& sequence : prefill.sequences) {
        sequence->row.reset();
        sequence->fed = fed;
        sequence->prefix.reset();  // a state takes memory: this one is in the row
        if (auto const error = errorOf([&] { source = placeOf(source); })) {
            errors.push_back(failed(sequence, *error));
            continue;
        }
        sequence->row = source;
        decoding_.push_back(sequence);
        joined.push_back(sequence);
    }
    return joined;
}

int64_t Scheduler::Impl::placeOf(int64_t source) {
    auto place = static_cast<int64_t>(decoding_.size());
    if (!session_.rowsByIndex()) {
        copyToLast(source, place);
    } else if (!taken(source)) {
        place = source;
    } else {
        place = freeRow();
        session_.copyRow(source, place);
    }
    return place;
}

void Scheduler::Impl::copyToLast(int64_t source, int64_t place) {
    if (source == place) return;
    auto const found =
        std::find_if(prefilling_.begin(), prefilling_.end(), [=](Prefill const& p) { return p.row == place; });
    if (found == prefilling_.end()) {
        session_.copyRow(source, place);
        return;
    }
    // There may be no free row but `source`, so the state of the other one waits outside of the rows.
    Prefill other = std::move(*found);
    prefilling_.erase(found);
    RowState state;
    if (auto const error = errorOf([&] { state = session_.readRow(place); })) {
        lost_.push_back(lose(other, *error));
        session_.copyRow(source, place);
        return;
    }
    auto const notCopied = errorOf([&] {
        session_.copyRow(source, place);
        other.row = freeRow(place);
    });
    if (auto const error = errorOf([&] { session_.writeRow(other.row, state); })) {
        lost_.push_back(lose(other, *error));
    } else {
        other.leader().row = other.row;
        prefilling_.push_front(std::move(other));
    }
    if (notCopied) throw BackendError(*notCopied);
}

void Scheduler::Impl::release(std::vector<Ref> const& sequences) {
    if (!session_.rowsByIndex()) return fillGaps(sequences);
    for (Ref const& sequence : sequences) {
        decoding_.erase(std::find(decoding_.begin(), decoding_.end(), sequence));
        leave(sequence);
    }
}

void Scheduler::Impl::fillGaps(std::vector<Ref> sequences) {
    std::sort(sequences.begin(), sequences.end(), [](Ref const& a, Ref const& b) { return *a->row > *b->row; });
    for (Ref const& sequence : sequences) {
        int64_t const row = sequence->row.value();
        while (true) {
            Ref const last = std::move(decoding_.back());
            decoding_.pop_back();
            if (last == sequence) break;
            auto const error = errorOf([&] { session_.copyRow(static_cast<int64_t>(decoding_.size()), row); });
            if (error) {
                leave(last);
                lost_.push_back(failed(last, *error));
                continue;
            }
            decoding_[static_cast<size_t>(row)] = last;
            last->row = row;
            break;
        }
        leave(sequence);
    }
}

void Scheduler::Impl::leave(Ref const& sequence) {
    sequence->row.reset();
    held_.erase(std::remove_if(held_.begin(), held_.end(), [&](Outcome const& o) { return o.sequence == sequence; }),
                held_.end());
}

}  // namespace less
