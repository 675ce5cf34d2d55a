"use strict";
// The card of a segment opens beside its first token: while the pointer or the focus is there, or until the next tap once
// tapped. The pointer has a moment to cross from the token to the card.
const CROSSING_MS = 250;

(() => {
  let open = null;
  let pinned = false;
  let leaving = 0;

  const cardOf = (token) => document.getElementById(token.dataset.card);
  const segmentOf = (token) =>
    token.closest(".response").querySelectorAll(`[data-segment="${token.dataset.segment}"]`);

  function place(card, token) {
    if (getComputedStyle(card).position === "fixed") return;
    const box = token.getClientRects()[0];
    const width = card.offsetWidth;
    const left = Math.min(Math.max(12, box.left - 16), document.documentElement.clientWidth - width - 12);
    const below = box.bottom + 8;
    const fits = below + card.offsetHeight < window.innerHeight || box.top < card.offsetHeight + 8;
    card.style.left = `${left + window.scrollX}px`;
    card.style.top = `${(fits ? below : box.top - card.offsetHeight - 8) + window.scrollY}px`;
  }

  function show(token) {
    clearTimeout(leaving);
    if (open === token) return;
    hide();
    open = token;
    const card = cardOf(token);
    card.hidden = false;
    place(card, token);
    token.setAttribute("aria-expanded", "true");
    segmentOf(token).forEach((part) => part.classList.add("lit"));
  }

  function hide() {
    if (!open) return;
    cardOf(open).hidden = true;
    open.setAttribute("aria-expanded", "false");
    segmentOf(open).forEach((part) => part.classList.remove("lit"));
    open = null;
    pinned = false;
  }

  function leave() {
    clearTimeout(leaving);
    leaving = setTimeout(() => {
      if (!pinned && document.activeElement !== open) hide();
    }, CROSSING_MS);
  }

  for (const card of document.querySelectorAll(".card")) {
    document.body.append(card);
    card.addEventListener("pointerenter", () => clearTimeout(leaving));
    card.addEventListener("pointerleave", leave);
  }
  for (const token of document.querySelectorAll("[data-card]")) {
    token.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse" && !pinned) show(token);
    });
    token.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") leave();
    });
    token.addEventListener("focus", () => { if (token.matches(":focus-visible")) show(token); });
    token.addEventListener("blur", () => { if (!pinned) hide(); });
    token.addEventListener("click", () => {
      const again = open === token && pinned;
      show(token);
      pinned = !again;
      if (again) hide();
    });
    token.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        token.click();
      }
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("click", (event) => {
    if (open && !event.target.closest(".card, [data-card]")) hide();
  });
})();
