"use strict";

// Names of classes and files are set as text, never as HTML.
const byId = (id) => document.getElementById(id);

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function say(text, isError) {
  byId("state").textContent = text;
  byId("state").className = isError ? "error" : "quiet";
}

function bars(parent, probabilities) {
  const table = add(parent, "div", undefined, "bars");
  const ranked = Object.entries(probabilities).sort((one, other) => other[1] - one[1]);
  for (const [name, probability] of ranked.slice(0, 5)) {
    add(table, "span", name).title = name;
    const bar = add(table, "progress");
    bar.max = 1;
    bar.value = probability;
    bar.setAttribute("aria-label", name);
    add(table, "span", (100 * probability).toFixed(1) + " %", "number");
  }
}

function nearest(parent, images) {
  add(parent, "h3", "Nearest training images");
  const list = add(parent, "ul", undefined, "nearest");
  for (const image of images) {
    const item = add(list, "li");
    const picture = add(item, "img");
    picture.src = image.thumbnail;
    picture.alt = "";
    picture.title = image.name;
    add(item, "span", image.class + " ");
    add(item, "span", image.similarity.toFixed(2), "quiet");
  }
}

function show(file, answer) {
  const card = document.createElement("article");
  const picture = add(card, "img");
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name;
  picture.onload = picture.onerror = () => URL.revokeObjectURL(picture.src);
  const text = add(card, "div");
  add(text, "h2", file.name);
  if (answer.error) {
    add(text, "p", answer.error, "error");
  } else {
    bars(text, answer.probabilities);
    if (answer.nearest) nearest(text, answer.nearest);
    if (answer.teacher) {
      add(text, "h3", "Nearest class means of the teacher");
      const listed = answer.teacher.map((found) => `${found.class} (${found.distance.toFixed(2)})`);
      add(text, "p", listed.join(", "));
    }
  }
  byId("answers").prepend(card);
}

async function send(files) {
  for (const [place, file] of files.entries()) {
    say(`Picture ${place + 1} of ${files.length} …`);
    const form = new FormData();
    form.append("picture", file, file.name);
    try {
      const response = await fetch("predict?top=5", { method: "POST", body: form });
      const answer = await response.json();
      show(file, answer.predictions ? answer.predictions[0] : answer);
    } catch (error) {
      say("The server does not answer. Is it still running?", true);
      return;
    }
  }
  say("");
}

const drop = byId("drop");
byId("choose").addEventListener("change", (event) => send([...event.target.files]));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") send([...event.dataTransfer.files]);
  });
}
byId("curl").textContent = `curl -F picture=@photo.jpg ${location.origin}/predict`;
fetch("health")
  .then((response) => response.json())
  .then((about) => {
    byId("model").textContent = document.title = about.model;
    byId("about").textContent =
      `${about.classes.length} classes, images of ${about.image_size} pixels` +
      about.notes.map((note) => `. Note: ${note}`).join("");
  })
  .catch(() => say("The server does not answer.", true));
