// Goroutines that talk through channels, timers, a server with clients, and garbage; spoken to line by line.
package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var (
	token    sync.Map
	failure  atomic.Value
	ticks    int64
	answers  int64
	messages int64
	garbage  int64
)

func fail(format string, args ...interface{}) {
	failure.CompareAndSwap(nil, fmt.Sprintf(format, args...))
}

// A ring of goroutines that pass a number on, each adding one.
func ring(n int) {
	first := make(chan int)
	in := first
	for i := 0; i < n; i++ {
		out := make(chan int, i%3)
		go func(in, out chan int) {
			for number := range in {
				out <- number + 1
			}
		}(in, out)
		in = out
	}
	for number := 0; ; number += n {
		first <- number
		if got := <-in; got != number+n {
			fail("%d came around instead of %d", got, number+n)
		}
		atomic.AddInt64(&messages, 1)
	}
}

func tick() {
	ticker := time.NewTicker(2 * time.Millisecond)
	for range ticker.C {
		timer := time.NewTimer(time.Millisecond)
		select {
		case <-timer.C:
		case <-time.After(time.Hour):
			fail("a timer of a millisecond did not end in an hour")
		}
		atomic.AddInt64(&ticks, 1)
	}
}

func collect() {
	kept := map[int][]byte{}
	sums := map[int][32]byte{}
	for i := 0; ; i++ {
		block := make([]byte, 10000)
		for j := range block {
			block[j] = byte(i * j)
		}
		kept[i%300], sums[i%300] = block, sha256.Sum256(block)
		other := (i * 7) % 300
		if sha256.Sum256(kept[other]) != sums[other] && kept[other] != nil {
			fail("block %d has changed", other)
		}
		atomic.AddInt64(&garbage, 1)
	}
}

func fetch(path string) (string, error) {
	response, err := http.Get("http://127.0.0.1:8080" + path)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

func client(name int) {
	for n := 0; ; n++ {
		path := fmt.Sprintf("/echo/%d/%d", name, n)
		body, err := fetch(path)
		if err != nil || body != path {
			fail("%q, %v instead of %s", body, err, path)
			return
		}
		atomic.AddInt64(&answers, 1)
		time.Sleep(3 * time.Millisecond)
	}
}

func goesOn() {
	counters := []*int64{&ticks, &answers, &messages, &garbage}
	for _, counter := range counters {
		before := atomic.LoadInt64(counter)
		for atomic.LoadInt64(counter) < before+3 && failure.Load() == nil {
			time.Sleep(time.Millisecond)
		}
	}
}

func answer(line string) string {
	command, argument, _ := strings.Cut(line, " ")
	got := "done"
	var err error
	switch command {
	case "set":
		_, err = fetch("/set/" + argument)
	case "get":
		got, err = fetch("/token")
	case "go":
		goesOn()
	}
	if err != nil {
		fail("%s: %v", command, err)
	}
	if what := failure.Load(); what != nil {
		return fmt.Sprintf("BAD %v", what)
	}
	return got
}

func main() {
	token.Store("token", "0")
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/set/"):
			token.Store("token", r.URL.Path[5:])
		case r.URL.Path == "/token":
			got, _ := token.Load("token")
			io.WriteString(w, got.(string))
		default:
			io.WriteString(w, r.URL.Path)
		}
	})
	go func() { fail("the server: %v", http.ListenAndServe("127.0.0.1:8080", nil)) }()
	for {
		if _, err := fetch("/token"); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for i := 0; i < 5; i++ {
		go client(i)
	}
	go ring(50)
	go tick()
	go collect()
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		fmt.Println(answer(lines.Text()))
	}
}
