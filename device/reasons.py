"""Every reason of operations.md, section 2, in a sentence for whoever looks after the device."""

from __future__ import annotations

SENTENCES = {
    # accepted, proposed
    "gate_passed": "The window has drifted and the new head passed every check.",
    "returned": "The window looks like the factory condition again; the factory head is back.",
    "dry_run": "The new head passed every check; nothing was written because of --dry-run.",
    "awaiting_approval": "The new head passed every check and waits for your approval.",
    # kept: input
    "too_few_samples": "The window has too few usable frames to estimate anything from.",
    "too_few_classes": "The window holds too few classes: its statistics would describe them, not the sensor.",
    "bad_input": "The frames don't fit the bundle's input contract.",
    "source_lost": "The source delivers no more frames; look at the camera, its cable or the folder.",
    # kept: drift
    "no_drift": "The window looks like the calibration data; there is nothing to correct.",
    "drifted": "The window differs from what the head in force was solved for.",
    "unconfirmed": "One window has drifted; the next ones must confirm it before anything is learnt.",
    "unknown_content": "The frames show what the network was not trained on: this needs labels, not recalibration.",
    # kept: policy
    "mode_off": "Learning is off (mode off).",
    "mode_observe": "The device only observes and reports (mode observe).",
    "frozen": "Learning is frozen; unfreeze the device to let it learn again.",
    "busy": "Another update runs or a new head is on probation; it is finished first.",
    "min_interval": "The last update is too recent; the device waits before the next.",
    "daily_limit": "The device has had its updates for today.",
    "cooldown": "A head was rolled back lately; the device waits a day before it learns again.",
    # kept: resources
    "too_hot": "The chip is too hot to solve on; the device waits until it has cooled down.",
    "throttled": "The firmware slows the chip down; the device waits until it no longer does.",
    "under_voltage": "The supply voltage is too low; look at the power supply and its cable.",
    "low_battery": "The battery is too low to spend energy on learning.",
    "power_limit": "The board draws more power than it may; the device waits until it draws less.",
    "low_memory": "Too little memory is free to solve beside the inference.",
    "low_disk": "Too little room is left on the card or disk for another generation.",
    "write_budget": "Today's budget of bytes written to the card is spent.",
    "deadline_missed": "The inference missed its deadlines; learning would slow it down further.",
    # kept: solve
    "out_of_time": "Not even the smallest window fits into the time allowed.",
    "memory_bound": "Not even the smallest window fits into the memory allowed.",
    "not_finite": "The solve met NaN or inf; look at the frames.",
    "gap_too_large": "The solve ended too far from its optimum.",
    "ill_conditioned": "The window says too little: its equations can't be solved reliably.",
    "cancelled": "The update was cancelled before it ended; nothing was changed.",
    "solver_crashed": "The process that solves ended unexpectedly; the head in force was not touched.",
    # kept: gate
    "anchor_agreement": "The new head would forget the source condition: it disagrees on the anchors.",
    "anchor_logits": "The new head would move the scores of the anchors too far.",
    "heldout_worse": "The new head is no closer to the re-normalised teacher on held-out frames.",
    "confidence_collapse": "The new head would be far less certain than the teacher.",
    "marginal_shift": "The new head would predict far fewer classes than the teacher.",
    "move_too_large": "The new head lies too far from the one in force to be trusted.",
    "parity_failed": "The new head doesn't give the same answers here as it did when it was solved.",
    # kept: swap
    "write_failed": "The new head could not be written; look at the disk. The old one is in force.",
    "checksum_failed": "What was written didn't read back as it should; look at the card. The old head is in force.",
    # rollback
    "probation_errors": "The new head failed on frames that the one before could answer.",
    "probation_latency": "The new head made answers slower than the one before.",
    "probation_confidence": "The new head became less certain than the one before.",
    "probation_drift": "The new head didn't bring the drift down.",
    "crash_loop": "The process crashed again and again with the new head; the one before is back.",
    "operator": "A person asked for it.",
    "vendor_update": "The vendor's bundle has changed; its factory head is in force.",
    "corrupt_state": "What was learnt was damaged; the newest intact head is in force.",
    # commands
    "rejected": "A person rejected the proposed head; the one in force stays.",
    "approved": "A person approved the proposed head.",
    "candidate_stale": "The proposal was made for a head that is no longer in force; recalibrate again.",
    "no_candidate": "There is no proposal to decide on.",
}

TARGETS = {
    "renormalised_teacher": "the original network, re-normalised to this input",
    "moment_alignment": "features aligned with those of the factory",
    "labels": "labels given for this device's frames",
    "remote_teacher": "a larger network elsewhere",
}


def sentence(reason: object) -> str:
    """The sentence for `reason`; a reason that isn't known here, with its underscores as spaces."""
    text = str(reason or "")
    return SENTENCES.get(text) or text.replace("_", " ").capitalize()
