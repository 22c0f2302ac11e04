// Keyboard shortcuts, theme, token values on tap, copying, sorting of exported tables. Pages work without this script.
"use strict";
const $ = (selector, from = document) => from.querySelector(selector);

// ---- theme ----
const root = document.documentElement;
const stored = () => { try { return localStorage.getItem("cratelm-theme"); } catch { return null; } };
if (stored()) root.dataset.theme = stored();
const themeButton = $("#theme");
if (themeButton) {
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { themeButton.textContent = dark() ? "light" : "dark"; themeButton.setAttribute("aria-label", `${themeButton.textContent} theme`); };
  themeButton.hidden = false;
  name();
  themeButton.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("cratelm-theme", root.dataset.theme); } catch { /* storage is blocked: the theme applies to this page only */ }
    name();
  });
}

// ---- keys ----
const go = (selector) => { const link = $(selector); if (link) location.href = link.href; };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  const actions = {
    "/": () => $("#find")?.focus(),
    j: () => go("a[rel=next]"), k: () => go("a[rel=prev]"),
    u: () => { const up = [...document.querySelectorAll(".bar nav a")].pop(); if (up) location.href = up.href; },
    t: () => { const modes = [...document.querySelectorAll("input[name=mode]")]; if (modes.length) modes[(modes.findIndex((m) => m.checked) + 1) % modes.length].checked = true; },
    "?": () => $("#keys").showModal(),
  };
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
});

// ---- show the value of a token on tap ----
let tip = null;
document.addEventListener("click", (event) => {
  tip?.remove();
  const token = event.target.closest(".line [title]");
  if (!token) return;
  tip = document.createElement("div");
  tip.id = "tip";
  tip.textContent = token.title;
  document.body.append(tip);
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.min(box.left + scrollX, scrollX + innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${box.bottom + scrollY + 3}px`;
});

// ---- export ----
const report = (text) => { const done = $("#done"); if (done) done.textContent = text; };
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const from = $(`#${button.dataset.from}`);
    try {
      const api = $("article").dataset.json;
      const json = async () => api ? (await fetch(api)).json() : JSON.parse(from.textContent);
      const text = button.dataset.from === "json" ? JSON.stringify(await json(), null, 1) : from.value;
      await navigator.clipboard.writeText(text);
      report("copied");
    } catch { report("the browser does not allow copying from this page: open the file instead"); }
  });
}
const png = $("#png");
if (png) {
  png.hidden = false;
  png.addEventListener("click", () => {
    const { svg, name } = JSON.parse($("#card").textContent);
    const picture = new Image();
    picture.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 2 * picture.width;
      canvas.height = 2 * picture.height;
      canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
      const link = document.createElement("a");
      link.download = name;
      link.href = canvas.toDataURL("image/png");
      link.click();
      report("saved");
    };
    picture.onerror = () => report("the picture could not be drawn");
    picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  });
}

// ---- tables of an exported folder are sorted and filtered in the browser ----
for (const table of document.querySelectorAll("table.sortable")) {
  const value = (row, column) => { const cell = row.cells[column]; const text = cell.dataset.value ?? cell.textContent; return text === "" ? NaN : isNaN(text) ? text : Number(text); };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
      });
      table.tBodies[0].append(...rows);
    });
  });
  const box = document.createElement("p");
  box.className = "row";
  const label = document.createElement("label");
  label.textContent = "filter ";
  const field = document.createElement("input");
  field.type = "search";
  label.append(field);
  box.append(label);
  table.closest(".scroll").before(box);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
