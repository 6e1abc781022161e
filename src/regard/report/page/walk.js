// Steps one by one: everything is on the page already, and shown where there is no script.
"use strict";
const steps = [...document.querySelectorAll(".step")];
const [first, back, next, all, place] = ["first", "back", "next", "all", "place"].map((id) => document.getElementById(id));
let now = steps.length;

function show(count) {
  now = Math.max(1, Math.min(count, steps.length));
  steps.forEach((step, i) => {
    step.hidden = i >= now;
    step.classList.toggle("now", now < steps.length && i === now - 1);
  });
  back.disabled = now === 1;
  next.disabled = now === steps.length;
  place.textContent = now === steps.length ? "all steps" : `step ${now} of ${steps.length}`;
  if (now < steps.length) steps[now - 1].scrollIntoView({ block: "nearest" });
}

back.addEventListener("click", () => show(now - 1));
first.addEventListener("click", () => show(1));
next.addEventListener("click", () => show(now + 1));
all.addEventListener("click", () => show(steps.length));
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowRight") show(now + 1);
  else if (event.key === "ArrowLeft") show(now - 1);
  else if (event.key === "Home") show(1);
  else if (event.key === "End") show(steps.length);
  else return;
  event.preventDefault();
});
document.querySelector("nav").hidden = false;
show(steps.length);
