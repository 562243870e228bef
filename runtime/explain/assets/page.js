"use strict";
const root = document.documentElement;
const stored = (() => { try { return localStorage.getItem("fxlm-theme"); } catch { return null; } })();
root.dataset.theme = stored || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("fxlm-theme", root.dataset.theme); } catch { /* a file has no storage */ }
});
function press(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
}
for (const tools of document.querySelectorAll(".tools[data-for]")) {
  const figure = document.getElementById(tools.dataset.for);
  const shows = tools.querySelectorAll("button[data-show]");
  for (const button of shows) button.addEventListener("click", () => {
    figure.dataset.show = button.dataset.show;
    press(shows, button);
  });
  const zoom = tools.querySelector("button[data-zoom]");
  zoom.addEventListener("click", () => {
    zoom.setAttribute("aria-pressed", String(figure.classList.toggle("fit")));
    look(figure);
  });
}
for (const tools of document.querySelectorAll(".tools[data-tabs]")) {
  const tabs = tools.querySelectorAll("button[data-tab]");
  for (const button of tabs) button.addEventListener("click", () => {
    press(tabs, button);
    for (const other of tabs) document.getElementById(other.dataset.tab).hidden = other !== button;
  });
}
function look(figure) {  // at what changed
  const marked = figure.querySelector(".box.added, .box.removed, .box.changed");
  if (!marked) return;
  const box = marked.getBoundingClientRect(), frame = figure.getBoundingClientRect();
  figure.scrollTop += box.top - frame.top - 60;
  figure.scrollLeft += box.left + box.width / 2 - frame.left - frame.width / 2;
}
for (const figure of document.querySelectorAll(".figure")) look(figure);
root.dataset.ready = "true";
